"""A medium that boots a real machine into an image: kernel, initrd and command line, nothing else (docs/root.md)."""
