"""Small programs as people write them, and the test that they train as in plain Keras."""
