"""Pure numerics: arrays in, arrays out. Keyword scalars, never a config; no jit, no state, no device."""
