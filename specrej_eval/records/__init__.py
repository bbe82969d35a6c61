"""A finished request on disk: journal, outputs folder, trace. Written and read here, and nowhere else. No torch."""
