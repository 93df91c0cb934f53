"""The parts of benchmark.py.

`settings` has the flags, `rows` the table and the processes that fill it, `with_keras` and
`with_torch` what runs in such a process, `floor` the time of its products alone, `report`,
`markdown` and `plot` what is made of the numbers. `in_turn`, `network` and `tuners` are the other
modes; in that of --tables, `tables` and `learning_curves` have what is searched, `table_searches`,
`curve_searches` and `population` search. `scaling` computes, and measures nothing.
"""
