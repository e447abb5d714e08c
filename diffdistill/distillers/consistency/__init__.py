"""Consistency methods: a map constant along each trajectory of the teacher."""
