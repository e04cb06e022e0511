"""What people look at: the data card of a version, and rows as the model will see them."""
