// What TypeScript's own checks leave open; layout is prettier's.
import js from '@eslint/js';
import ts from 'typescript-eslint';

export default ts.config(
  {
    ignores: ['build/', 'lib/', 'prebuilt/', 'node_modules/', 'ui-tests/']
  },
  js.configs.recommended,
  ...ts.configs.strict,
  {
    files: ['src/**/*.{ts,tsx}', 'test/**/*.ts'],
    languageOptions: {
      parserOptions: {
        project: ['./tsconfig.json', './tsconfig.test.json'],
        tsconfigRootDir: import.meta.dirname
      }
    },
    rules: {
      '@typescript-eslint/consistent-type-imports': 'error',
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/no-misused-promises': 'error',
      '@typescript-eslint/switch-exhaustiveness-check': [
        'error',
        { considerDefaultExhaustiveForUnions: true }
      ],
      '@typescript-eslint/no-extraneous-class': 'off',
      curly: 'error',
      eqeqeq: 'error',
      'no-console': 'error'
    }
  },
  {
    // `describe` and `it` of node's runner answer promises that it awaits itself
    files: ['test/**/*.ts'],
    rules: { '@typescript-eslint/no-floating-promises': 'off' }
  },
  {
    files: ['*.js'],
    languageOptions: { globals: { module: 'writable' } }
  }
);
