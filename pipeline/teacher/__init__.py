"""A teacher as a service: what to ask, what the store has of it, what the rest costs, and asking."""
