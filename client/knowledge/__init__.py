"""What medicine knows without any patient: codes, diseases, drugs, and how they hang together."""
