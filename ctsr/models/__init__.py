"""Networks, and the file format that holds them."""
