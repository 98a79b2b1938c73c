"""What touches a model: capturing its features, running it, statistics of a teacher."""
