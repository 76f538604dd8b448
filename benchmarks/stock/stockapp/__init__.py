"""What is measured of stock Flower: the message flow of secure aggregation, without its secrets."""
