"""Keys and values behind a shared prefix, and attention over them: what the engine and the reward models share."""
