raise SystemExit('moved to tools/paper/verify_configs.py')
