"""Text in, windows of token ids out. Import from the modules: only `datamodule` needs Lightning."""
