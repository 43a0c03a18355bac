raise SystemExit('moved to tools/paper/make_index.py')
