"""The main job on a real encoder and real sentences, from training to a checkpoint that loads anywhere."""
