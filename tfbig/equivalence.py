def check_equivalence(*a): pass
