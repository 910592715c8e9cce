"""The sections: each has `run`, which takes the workplace and returns rows."""
