"""What train.py can train: a module for each task, and what the tasks are made of.

This file imports none of them, so that `saved_models` brings no flags into other programs.
"""
