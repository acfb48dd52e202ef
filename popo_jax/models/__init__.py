"""The policy: a decoder with Qwen2's architecture, and its checkpoints in Hugging Face's format."""
