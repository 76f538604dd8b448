"""The terms of every task: what is learned, from which columns, and what comes out."""
