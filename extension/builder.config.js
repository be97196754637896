// Module ids by order: the default ones depend on the folder the build runs in, and what is built
// is committed, so it has to be the same everywhere.
module.exports = {
  optimization: { moduleIds: 'natural', chunkIds: 'natural' }
};
