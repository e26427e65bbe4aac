
Preprocessing = load = save = None
