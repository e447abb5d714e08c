"""Methods that match the student's noised marginals to the teacher's."""
