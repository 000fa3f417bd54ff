"""Client and service do alike, byte by byte, what is in these files. They are for packages of this project; users call
`Client`.
"""
