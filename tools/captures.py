raise SystemExit('moved to tools/analysis_tools/captures.py')
