namespace bsfast {}
