"""Names: signed, numbered pointers to images, and the book of whose they are (docs/names.md)."""
