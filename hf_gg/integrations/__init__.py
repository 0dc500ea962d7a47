"""One module for each neighbour. Nothing is imported here: a neighbour that is not installed costs nothing."""
