"""The stages of the main job, each in a file of its own: teacher, embedding, students, losses, training, scores."""
