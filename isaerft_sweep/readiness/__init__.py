"""Before a sweep: is the place ready, is everything there, what will it take?"""
