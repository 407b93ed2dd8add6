"""A package cache whose users share it: distribution packages, verified, from mirrors and peers."""
