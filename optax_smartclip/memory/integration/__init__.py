"""The names under which other libraries for height-compressed gradients have them."""
