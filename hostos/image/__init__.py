"""Images on the host: packing, storing, publishing and seeding them."""
