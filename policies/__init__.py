"""Shipped policies, a card each, and the code that trains them."""
