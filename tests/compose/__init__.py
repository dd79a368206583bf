"""Brings docker-compose.yml up as a user does, and sees it learn, predict, measure and recover.

`python -m tests.compose`, with a Docker Engine running.
"""
