"""How students and rewards are trained, and how close a student is to its teacher."""
