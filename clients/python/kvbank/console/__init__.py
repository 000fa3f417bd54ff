"""The commands of every package of this project print by these files, and end by them. They are for packages of this
project.
"""
