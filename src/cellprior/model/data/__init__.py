"""What is read: raw counts and their checks, files, minibatches."""
