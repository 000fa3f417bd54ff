"""Files and folders as every package of this project writes them. For packages of this project."""
