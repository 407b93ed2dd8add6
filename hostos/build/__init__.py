"""Profile -> kernel + initrd. Knows nothing of machines, images or live boot (docs/build.md)."""
