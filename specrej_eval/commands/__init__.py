"""The commands of `specrej-eval`: one file or folder each; this listing is the table of commands."""
