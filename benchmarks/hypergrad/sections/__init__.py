"""The sections: each has a function `run` that takes the workplace and returns rows."""
