"""Where a policy lies: a folder, a bucket, or a model of the Hugging Face hub, fetched into its cache."""

from __future__ import annotations

from etils import epath

from popo_jax.types import UserError

FILES = ["*.json", "*.jinja", "*.safetensors"]
"""What is fetched of a model on the hub."""


def locate(name: str, what: str = "policy.path") -> epath.Path:
    """The folder called `name`, or the one that the hub's model ORGANIZATION/NAME (with @REVISION, if given) is fetched to.

    Errors: UserError, which calls it `what`, if neither is there.
    """
    folder, (repo, _, revision) = epath.Path(name), name.partition("@")
    if "://" in name or folder.exists() or repo.count("/") != 1 or name.startswith((".", "/", "~")):
        return folder
    import huggingface_hub  # slow to import, and most runs fetch nothing

    try:
        return epath.Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=FILES))
    except Exception as e:  # of many kinds: no such model, no access, no network
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{what} must be a folder or a model of the hub, got {name}: no such folder, and {why}") from None
