"""What check-data says of the data: collected, as text, as a page."""
