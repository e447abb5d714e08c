"""Trajectory methods: the student lands where the teacher's own solver lands."""
