"""Networks and the roles they play."""
