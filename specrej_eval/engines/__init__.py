"""The decoding core: token ids in, token ids out. It knows no harness, no reward model and no strategy."""
