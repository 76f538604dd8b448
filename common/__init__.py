"""What both sides share; it knows neither."""
