"""Tests of what is written for people: the pages agree with the code, and their examples run as printed."""
