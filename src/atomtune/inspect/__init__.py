"""`atomtune inspect`: what of your records is learned, and what is wrong with them."""
