"""What a recipe says, section by section: keys, defaults, and what is refused."""
