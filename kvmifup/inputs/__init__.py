"""What others wrote, made into validated data."""
